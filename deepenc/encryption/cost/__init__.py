"""What allocations cost, and budgets."""
