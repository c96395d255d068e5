"""The data plane: batches become payloads (``codec``), their large buffers become residents (``store``)."""
