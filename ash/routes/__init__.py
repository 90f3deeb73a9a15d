"""The routes under `/api`, `/health` and `/metrics`: one module a resource, each with its ROUTES. No SQL, no files, no processes here."""
