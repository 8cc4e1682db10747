"""Which single weights stay, and what should the rest become?"""
