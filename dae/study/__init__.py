"""Studies: a comparison as a plan of commands, run to its end and told in a table."""
