"""Recipes: functions that return a Run."""
