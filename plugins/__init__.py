"""Built-in rewards. They use the same interface as any plugin: docs/rewards.md."""
