"""The migrations of the database, one numbered .sql file each. They are applied once, in order, and never edited afterwards."""
