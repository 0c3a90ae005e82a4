"""Files a mapping comes from and a plan goes to."""
