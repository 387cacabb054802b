// offsets[e] = number of pairs whose expert is below e, for e = 0 ... E; expert is ascending
//
// Grid (E + 1): a thread for each; a search for the first place that may hold e.
const int e = thread_position_in_grid.x;
int low = 0;
int high = expert_shape[0];
while (low < high) {
    const int middle = (low + high) / 2;
    if (static_cast<int>(expert[middle]) < e) {
        low = middle + 1;
    } else {
        high = middle;
    }
}
offsets[e] = low;
