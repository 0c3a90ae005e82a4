"""What counts, tags and prioritises packets: one interface, several backends."""
