"""What training code needs: transfer, parameter groups, freezing, schedules, and the state of another run."""
