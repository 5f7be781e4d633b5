"""What an export leaves beside the artefacts: its card, a page to read, and the lock of its folder."""
