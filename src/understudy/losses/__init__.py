"""What is minimised: divergences, advantages, the terms that methods return, and schedules."""
