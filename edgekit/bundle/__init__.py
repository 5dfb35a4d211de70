"""The bundle format: its manifest, how it is read, checked and written."""
