"""The recipe: what the user asked for, read, checked and explained. No torch."""
