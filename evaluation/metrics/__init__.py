"""Scores of generated images against references and prompts, behind callables that a stub can stand in for.

* backbones: what turns images and texts into features.
* alignment: CLIP text and image alignment, whole and masked, and their geometric mean.
* report: scores of folders as rows of CSV and JSON (scripts/evaluate.py).
"""
