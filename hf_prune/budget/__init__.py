"""How much may stay: exact costs, and solvers that choose units within a budget."""
