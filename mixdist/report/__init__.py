"""What people look at: metrics, tables, pictures."""
