"""From a decision to the status and the Events that people read. All pure."""
