"""Plain values that every floor stands on: errors, sites, hashing, randomness, statistics, findings, views."""
