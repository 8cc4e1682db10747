"""How a result is shown: one dictionary of figures, a table, a picture, a model card."""
