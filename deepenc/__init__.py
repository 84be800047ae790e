"""The arena for confusion neurons: encrypt trained networks, attack them, measure what the thief got."""
