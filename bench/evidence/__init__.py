"""Small experiments behind what is claimed of the structured matrices. Each writes one JSON file and one picture."""
