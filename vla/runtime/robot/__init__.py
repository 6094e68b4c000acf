"""`vla run`: a policy drives an arm, through pre-flight, soft start, control loop and a clean end."""
