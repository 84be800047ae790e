"""What whoever writes an attack can use."""
