"""What may be trusted: tenants stay apart, secrets stay secret, connections stay sound."""
