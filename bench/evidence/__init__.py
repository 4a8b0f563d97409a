"""Small experiments behind what is claimed of the methods. Each writes one JSON file and one picture."""
