"""Which waiting requests run together and when: pure rules (batcher, queues) and the driver that applies them."""
