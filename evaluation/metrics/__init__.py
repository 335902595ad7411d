"""Scores of generated images against references and prompts, behind callables that a stub can stand in for."""
