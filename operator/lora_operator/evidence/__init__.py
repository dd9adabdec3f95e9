"""What no watch shows, read beside the looks: logs, Events, queues."""
