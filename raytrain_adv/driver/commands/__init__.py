"""The raytrain-adv commands."""
