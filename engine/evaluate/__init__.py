"""Features, nearest neighbours and linear probes."""
