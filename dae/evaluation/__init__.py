"""How good it is: predict in the patient's own space, score, compare."""
