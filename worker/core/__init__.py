"""What every part shares: settings, logs, errors, records, state changes, outbox, audit."""
