"""Questions asked of many duels: which configuration of a defense is the best."""
