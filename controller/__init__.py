"""The SDN controller: it sees where each MAC is, and moves the flows when a MAC moves."""
