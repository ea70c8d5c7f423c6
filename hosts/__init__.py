"""The hypervisors and their manager: agents, guests, the migration engine."""
