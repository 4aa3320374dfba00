"""The steps from each schema to the next one, which Alembic runs.

A new step is a file in `versions` with the next number, and `database.SCHEMA` is that number.
"""
