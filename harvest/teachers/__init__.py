"""Thin adapters: one module per family of teachers, chosen by the class in model_index.json."""
