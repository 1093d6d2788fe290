"""What training needs: transfer, parameter groups, weight decay, freezing, schedules, and the state of an optimizer or scheduler."""
