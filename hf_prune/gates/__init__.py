"""Gates: one number per unit, multiplied into the input of the output projection.

The same object gives scores (its gradient) and masks (0 or 1). A gate changes no parameter and no
parameter name, needs nothing after an optimizer step, and leaves no trace in what is saved.
"""
