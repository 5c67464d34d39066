"""Plans in the words of other engines, one function an engine; recipes.py holds the table."""
