"""One HTTP client for engines, teachers and judges: concurrent requests, retries, replicas, deadlines."""
