"""The insides of `ash.client`: HTTP, requests, records and streams. Outsiders import `ash.client`, never these."""
