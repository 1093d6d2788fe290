"""What speaks for a pair of look-alikes: names, numbers, order, company, values. Evidence is counted here, and nothing chosen."""
