"""L0: what every layer may use: errors, knobs, registry, log, progress, fingerprint."""
