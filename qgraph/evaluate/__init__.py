"""How good a compiled model is: similarity to the float model, and scores on labelled data."""
