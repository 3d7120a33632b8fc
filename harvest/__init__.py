"""The workshop where the teacher lives: it asks the teacher once and writes down what it said."""
