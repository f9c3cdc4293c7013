"""L4: runs Plans. Knows no builder, passes or frontends."""
