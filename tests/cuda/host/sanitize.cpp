// Every kernel once over buffers of exactly the size they may use, for address, undefined-behaviour and thread
// sanitizers. Values are the business of the tests in Python.
#include "kernels.cpp"

static std::mt19937_64 words(1);

static std::vector<u64> random_words(u64 count) {
    std::vector<u64> result(count);
    for (u64& word : result) word = words() & words(); // few bits set: coordinates are often equal
    return result;
}

static void run(u32 numel, u32 blocks) {
    const u32 padded = (numel + 7) / 8 * 8;
    const std::vector<u64> base = random_words((u64)padded * BASE::BITS / 64),
                           tuned = random_words((u64)padded * TUNED::BITS / 64);
    std::vector<Tile> tiles;
    for (u32 start = 0; start < numel; start += TILE)
        tiles.push_back({(u64)start * BASE::BITS / 8, (u64)start * TUNED::BITS / 8, start / 8,
                         std::min(TILE, numel - start), 0});
    const u32 count = (u32)tiles.size();
    std::vector<u8> mask(padded / 8);
    std::vector<double> sums(count * SUMS), tails(count * SUMS);
    std::vector<u64> rows(ROWS * BINS), low(3 * LOW_BINS), firsts(count), counts(ROWS * BINS);
    std::vector<u32> places(ROWS * BINS);
    Record record = {};
    u64 next = 0;
    u32 found = 0;

    ScanSettings settings = {};
    settings.rule = TOP;
    settings.eta = 1e-3;
    settings.cut = settings.tie = 1 << 20;
    settings.ties = 100, settings.take = 30;
    Search search = {};
    search.delta_count = search.weight_count = 1;
    search.shift = 16;
    on_host::launch(blocks, THREADS, numel, [&] {
        scan(tiles.data(), count, settings, (const u8*)base.data(), (const u8*)tuned.data(), mask.data(), sums.data(),
             &record, rows.data());
    });
    on_host::launch(1, 1, numel, [&] { place_ties(sums.data(), count, 1, 5, firsts.data(), &next); });
    on_host::launch(blocks, THREADS, numel, [&] {
        take_ties(tiles.data(), count, settings, (const u8*)base.data(), (const u8*)tuned.data(), mask.data(),
                  firsts.data(), &record);
    });
    on_host::launch(blocks, THREADS, numel, [&] {
        refine(tiles.data(), count, search, (const u8*)base.data(), (const u8*)tuned.data(), tails.data(), &record,
               low.data());
    });
    on_host::launch(blocks, THREADS, numel,
                    [&] { harvest(rows.data(), rows.size(), places.data(), counts.data(), &found); });
}

int main(int, char** sizes) {
    for (u32 blocks = 2; *++sizes; blocks = 3 - blocks) run((u32)atoi(*sizes), blocks);
    puts("clean");
}
