"""What a run showed: numbers per size class, a table, pictures, a page."""
