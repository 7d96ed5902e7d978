"""What maintainers run: tables for the documentation, checks, searches. Nothing here is a bench."""
