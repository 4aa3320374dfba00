"""The schema of the first release. `database.migrate` says of such a database that it is here."""

revision = "1"
down_revision = None


def upgrade() -> None:
    """Do nothing: the first release has made the tables."""
