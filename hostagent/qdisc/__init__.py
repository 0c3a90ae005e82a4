"""The K strict bands on a NIC."""
