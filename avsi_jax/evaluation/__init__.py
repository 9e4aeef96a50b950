"""The command avsi-evaluate: protocols, metrics, reference systems, tables and reports."""
